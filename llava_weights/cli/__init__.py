"""Everything that speaks to a person: commands and their options, console, progress, reports, pictures, the demo.
Only this room prints."""
