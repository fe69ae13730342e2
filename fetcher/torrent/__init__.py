"""BitTorrent: magnet, metainfo, the seam to libtorrent, the swarm, seeding."""
