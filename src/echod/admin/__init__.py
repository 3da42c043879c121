"""The admin listener: probes, metrics, status and a page over HTTP, at a bounded cost to the echo.

`http.Admin` is the entry point, and `page.html` is the page. The daemon passes a `snapshot.DaemonView`, through which
this package reads counters and settings; it changes nothing. aiohttp and prometheus-client are optional dependencies, so
the daemon imports this package only if `admin.address` is set. It may import `echod.server`, `echod.settings` and the
packages below them, and never `echod.daemon`.
"""
