"""The main job, end to end, as a program: `deltastore demo`."""
