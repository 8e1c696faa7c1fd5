"""Sinks: where reports go. One writer per file; a sink is a config that `open(run)`s a writer."""
