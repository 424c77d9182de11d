"""Is a checkpoint right? By its records, its sources, published checksums and itself; and two checkpoints compared.
Each check gives findings; none changes a file."""
