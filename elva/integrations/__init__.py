"""ELVA in other people's programs: a file a framework, each of which imports it lazily."""
