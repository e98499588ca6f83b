"""Reports: a run's files as charts, pictures and pages."""
