"Reads `settings.ini`; everything that could be changed is there"
from configparser import ConfigParser
from setuptools import setup, find_namespace_packages

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf8')
cfg = config['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    url=cfg['git_url'], license='Apache-2.0', keywords=cfg['keywords'].split(), python_requires='>='+cfg['min_python'],
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'Programming Language :: Python :: 3'],
    project_urls={'Source': cfg['git_url']}, author_email=cfg['author_email'],
    packages=find_namespace_packages(include=['sasformer', 'sasformer.static', 'sasformer.splits']),
    package_data={'sasformer.splits': ['*.json'], 'sasformer.static': ['*']},
    long_description=open('README.md', encoding='utf8').read(), long_description_content_type='text/markdown',
    install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(), 'tensorboard': ['tensorboard'],
                    'onnx': ['onnx', 'onnxruntime', 'onnxscript'], 'annotate': ['starlette', 'uvicorn', 'anywidget'],
                    'tiff': ['imagecodecs']},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['sasformer=sasformer._modidx:d']},
)
