"""The engine file and the runtimes that run its graph; nothing here knows a method."""
