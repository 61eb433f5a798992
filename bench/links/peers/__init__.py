"""What users of other tools write by hand, on the main job's model, data and schedule."""
