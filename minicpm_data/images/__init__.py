"""Images: opened, cut into slices, made into pixels and into places of a prompt."""
