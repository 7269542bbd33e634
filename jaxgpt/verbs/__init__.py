"""What each verb of the command line does, a module for each group."""
