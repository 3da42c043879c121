"""The probe of a UDP echo: one quick check, or a measurement.

`payload` makes the datagrams, and `tally` decides which of them are received, lost, late, duplicated or reordered; both
do no I/O. `sockets` opens the socket, and `icmp` reads the errors that the network reports. `check` is the quick check,
`measure` the loop of a measurement, and `report` shows its results.
"""
