"""The review as one HTML file that needs no server and no network.

page           builds the data and fills the template: page.html, page.css and page.js beside it
parallel_axes  axes, ticks and positions of the parallel coordinates
"""
