"""One spelling of what models write in many ways."""
