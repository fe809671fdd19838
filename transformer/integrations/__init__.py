"""The package inside other libraries' models, one file each. None of those libraries is needed to import this one."""
