"""Files from the hub or a mirror of it: resumed after a kill, checked, and usable while others still arrive."""
