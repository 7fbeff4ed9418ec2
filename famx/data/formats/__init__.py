"""Published and user-supplied data sets, each in a module with its tasks in a table `TASKS`."""
