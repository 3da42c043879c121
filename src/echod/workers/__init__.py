"""Several processes that serve one daemon's clients, and the parent that supervises them.

The parent serves no client. It has the settings, the sockets, the signals and the service manager. A spawner, which it forks
before there is a thread or a loop, forks the workers. May import everything except the command.
"""
