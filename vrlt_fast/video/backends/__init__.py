"""Decoders behind one interface; each says what it lacks and which files it can take."""
