"""What each method's paper proves, measured: `stepdistill verify`. One file a method, named as it is."""
