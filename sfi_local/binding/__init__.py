"""Everything that touches C: the library, contexts, the engine, devices."""
