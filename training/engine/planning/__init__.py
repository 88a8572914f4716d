"""How long a run is, in which steps, and what it will take."""
