"""The mathematics: schedules, predictions, denoisers, objectives, grids, samplers. No files, no networks."""
