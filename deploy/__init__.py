"""How servers and workers are started: the `datps` command, the local cluster, containers, recipes."""
