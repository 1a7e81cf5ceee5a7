"""Human preference: pairs of videos shown blind, votes, ELO ratings.

runs      run folders of several methods, matched by start image, prompt and seed
page      a static page that plays the pairs and keeps votes
votes     files of votes
ratings   ratings from votes, with their errors
report    table of ratings, Markdown and JSON
"""
