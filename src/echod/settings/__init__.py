"""The settings: their model, their sources, and the problems with them.

`model` has one frozen model per section, from which help, reference page and validation are derived. It builds on
`types` (the types of single values) and `conflicts` (valid values that do not work together). `problems` validates
values and reports every problem with its origin. `options` parses the command line, with the options and the help of
`parser`. `sources` merges the command line, the environment and the file. `toml` writes settings as a TOML document.
`resources` loads the certificates that the settings name. Modules of this package import `echod.text`,
`echod.net`, `echod.loops` and each other; nothing from the server, its connections or the daemon. Only `sources` imports
pydantic-settings, and only `options` and `parser` import argparse.
"""
