"""Bytes: magnet, metainfo, tensor index of a checkpoint, download, verify, store."""
