"""How ranks meet and talk: rendezvous, mesh, exchanges, pairs, islands."""
