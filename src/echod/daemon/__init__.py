"""The daemon: one process with its settings, log, event loop, listeners and signals.

`daemon` puts the process together and takes it apart. `plan` derives the listeners and their servers' settings, for the
start and for each reload. `reload` reads the settings again in a thread and applies them as a whole. `signals`
records signals from the start of the process to its end. `systemd` notifies the service manager. `logs` is the log:
`console` renders its lines for people, `log_formats` for programs, and `log_writer` writes them in a thread. Modules of
this package may import everything except the command line and the probe; `admin` is imported only if an address is set
for it.
"""
