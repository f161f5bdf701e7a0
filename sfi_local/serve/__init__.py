"""sfi-local serve: the OpenAI API and a page, over HTTP."""
