"""All commands share what is here: configs, errors of one sentence, progress lines, and files that are whole."""
