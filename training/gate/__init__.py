"""The data gate: what is wrong with rows before a model learns it. Each finding has a code, a level and its places."""
