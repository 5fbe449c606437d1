"""Many runs or measurements in one table."""
