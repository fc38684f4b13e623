"""What the notebooks ask of Colab's own package, which exists in Colab alone: its Drive and its secrets are told by the
environment. Like there, `google` is a namespace package."""
