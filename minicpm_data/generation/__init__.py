"""Generation, the half that both backends share."""
