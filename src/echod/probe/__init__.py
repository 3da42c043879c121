"""The client behind `echod probe`: one quick check of an echo server, or a measurement of it.

`command` chooses between the two. The quick check is a container's health check, so it imports no more than it needs:
no settings, no measurement, and TLS only on request. The modules here import `echod.net`, `echod.text` and
`echod.threads`, and nothing else of echod.
"""
