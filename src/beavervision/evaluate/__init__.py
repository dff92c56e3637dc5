"""Speed and quality, measured: :mod:`bench`, :mod:`doctor`, :mod:`follow`, :mod:`articulation`, :mod:`lse`, :mod:`quality`, and the
measures themselves in :mod:`scores`."""
