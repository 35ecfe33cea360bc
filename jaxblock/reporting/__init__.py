"""What people look at: terminal views, the HTML of ``inspect``, plots, progress."""
