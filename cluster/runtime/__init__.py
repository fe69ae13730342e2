"""Ray: started or joined, called with care, and asked about its nodes."""
