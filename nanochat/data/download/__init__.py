"""Files from the hub or a mirror: resumed after a kill, checked, usable while others still arrive."""
