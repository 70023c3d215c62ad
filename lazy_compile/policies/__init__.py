"""Who decides: schedules, gate tables, and the policies that read them. Imports ir."""
