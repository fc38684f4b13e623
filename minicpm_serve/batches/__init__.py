"""Files of prompts, answered by the engine: reading them, the file of results, and the loop between them."""
