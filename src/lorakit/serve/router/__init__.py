"""Several servers of one base behind one address: each adapter has its replica, and none of them can be missed."""
