"""The pages. Each answers one written question.

The folder is not called `pages`: Streamlit takes a folder of that name beside the script for its
own, and runs the files in it as scripts when a fresh server is opened at a link to one of them.
"""
