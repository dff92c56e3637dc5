"""Speed and quality, measured: :mod:`bench`, :mod:`follow`, and the measures themselves in :mod:`scores`."""
