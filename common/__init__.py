"""What server and worker share: the wire contract, the job spec, the layout and the codecs."""
