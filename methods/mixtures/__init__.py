"""Model-mixture methods of the survey: models or their outputs are mixed."""
