"""Plans runs ahead of time: how much memory and time a run needs on given devices, and what to change if it does not fit."""
