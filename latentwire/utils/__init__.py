"""What every folder uses: settings and errors, files, run folders, this machine, registries."""
