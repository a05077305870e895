"""Before and after: samples, features, numbers, pictures and slow flow of several networks.

Every arm samples the same ids with the same noise and labels, so differences are paired. What is
made is kept in a folder beside the page, and a start that finds it goes on from there:

    settings.json           what was compared; a folder of something else is refused
    KEY_STEPS/, .npz        a set of pictures of each arm at each number of steps
    KEY_STEPS.features/     their features
    reference.features/, reference.npz    of real images, where no reference file was given
    pictures/               what the page shows
"""
