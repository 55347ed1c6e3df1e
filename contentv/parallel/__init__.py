"""Meshes of data, sequence and tensor ranks, and the two splits of a model over them."""
