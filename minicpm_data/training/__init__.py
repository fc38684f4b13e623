"""Training, the half that both backends share."""
