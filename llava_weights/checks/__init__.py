"""Is a checkpoint right? Verified by its records, by its sources, by published checksums and by itself; two of them compared.
Each check gives findings; none changes a file."""
