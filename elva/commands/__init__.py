"""Commands: functions from files to files, one for each verb of the command line."""
